"""`python -m cnf` is the `cnf` command."""

from cnf.cli import main

if __name__ == "__main__":
    main()

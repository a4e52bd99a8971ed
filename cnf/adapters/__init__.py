"""Flows behind the interfaces of other libraries, a file for each: scikit-learn, sbi."""

"""Data to learn from: densities with a formula, pictures as densities, and tables of points."""

from cnf.data.columns import Columns
from cnf.data.density import Toy
from cnf.data.images import IMAGE_SETS, Images, image_grid, read_images, write_images
from cnf.data.patches import bsds300
from cnf.data.pictures import Picture
from cnf.data.source import has_columns, load
from cnf.data.table_sets import TABLE_SETS
from cnf.data.tabular import Points, read_table, table_kind, write_table
from cnf.data.toys import TOYS, toy

__all__ = [
    "IMAGE_SETS",
    "TABLE_SETS",
    "TOYS",
    "Columns",
    "Images",
    "Picture",
    "Points",
    "Toy",
    "bsds300",
    "has_columns",
    "image_grid",
    "load",
    "read_images",
    "read_table",
    "table_kind",
    "toy",
    "write_images",
    "write_table",
]

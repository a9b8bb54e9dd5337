"""Tables in (named data sets, CSV, TSV, JSONL, Parquet, folders of pictures), Batches out."""

from cmaclip_fast.data.augment import Augmentation
from cmaclip_fast.data.catalog import Description, describe, list_datasets
from cmaclip_fast.data.check import RowPolicy, check_rows
from cmaclip_fast.data.classes import class_names, encode
from cmaclip_fast.data.examples import Examples, collate, make_loader
from cmaclip_fast.data.images import MAX_IMAGE_PIXELS
from cmaclip_fast.data.named import Columns, Taxonomy
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.split import split_table
from cmaclip_fast.data.table import Table, read_table
from cmaclip_fast.data.tokenizer import OpenClipTokenizer, Tokenizer, TrainedTokenizer, tokenizer_from_dict

__all__ = [
    "MAX_IMAGE_PIXELS",
    "Augmentation",
    "Columns",
    "Description",
    "Examples",
    "ImagePreprocessing",
    "OpenClipTokenizer",
    "RowPolicy",
    "Table",
    "Taxonomy",
    "Tokenizer",
    "TrainedTokenizer",
    "check_rows",
    "class_names",
    "collate",
    "describe",
    "encode",
    "list_datasets",
    "make_loader",
    "read_table",
    "split_table",
    "tokenizer_from_dict",
]

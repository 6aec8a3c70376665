"""Records: one row per cell, and tables of them. `load` reads whatever holds some."""

from capacity_gap.records.load import is_flag, is_number, load, read, scores_of, to_frame
from capacity_gap.records.record import RESULT_FIELDS, SCHEMA_VERSION, Record
from capacity_gap.store.files import RECORD

__all__ = [
    "RECORD",
    "RESULT_FIELDS",
    "SCHEMA_VERSION",
    "Record",
    "is_flag",
    "is_number",
    "load",
    "read",
    "scores_of",
    "to_frame",
]

"""Schemas: what values may be, the types they get, and how they grow."""

from __future__ import annotations

from llamactor.schema.describe import describe_schema
from llamactor.schema.functions import FunctionSchema, schema_of_function
from llamactor.schema.partial import PartialReader
from llamactor.schema.repair import repair
from llamactor.schema.values import Schema, schema_of

__all__ = (
    "FunctionSchema",
    "PartialReader",
    "Schema",
    "describe_schema",
    "repair",
    "schema_of",
    "schema_of_function",
)

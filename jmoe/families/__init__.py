"""Families of models: how each reads in Hugging Face's files, one module a family."""

from jmoe.families.family import Table as Table
from jmoe.families.table import FAMILIES as FAMILIES
from jmoe.families.table import family_of as family_of
from jmoe.families.table import from_hf as from_hf
from jmoe.families.table import lookup as lookup
from jmoe.families.table import to_hf as to_hf

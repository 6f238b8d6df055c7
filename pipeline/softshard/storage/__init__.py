"""File systems and object stores: the only package that reads and writes bytes.

    open_store(OUT) -> LocalStore | ObjectStore        find_inputs(uri), open_input(uri) -> bytes of a source
                       local.py     objects.py         listing.py        inputs.py, compression.py
                       a disk       \\___ s3.py, object_reader.py: requests with a retry policy

Inputs are opened as streams and decompressed while they are read. Outputs are written through `Store`, whole objects
only: `put_once` and `create_exclusive` never overwrite, `replace` is for pointers and reports. An object is visible
only when it is complete and synced. Credentials come from the environment; no error, name or record contains them.
"""

from softshard.storage.compression import COMPRESSIONS, find_compression, unpack_by_content, without_compression
from softshard.storage.folders import did_you_mean
from softshard.storage.inputs import content_version, open_input
from softshard.storage.listing import InputFile, Inputs, find_inputs, forget_listings, is_unchanged, list_inputs
from softshard.storage.local import LocalStore
from softshard.storage.location import OUTPUT_FORMS, find_store_kind, find_uri_problem, open_store
from softshard.storage.objects import ObjectStore
from softshard.storage.outages import InputChanged, find_outage, is_missing, network_errors, source_failure
from softshard.storage.prefixed import PrefixedStream
from softshard.storage.s3 import RetryPolicy
from softshard.storage.store import Store

__all__ = [
    "COMPRESSIONS",
    "OUTPUT_FORMS",
    "InputChanged",
    "InputFile",
    "Inputs",
    "LocalStore",
    "ObjectStore",
    "PrefixedStream",
    "RetryPolicy",
    "Store",
    "content_version",
    "did_you_mean",
    "find_compression",
    "find_inputs",
    "find_outage",
    "find_store_kind",
    "find_uri_problem",
    "forget_listings",
    "is_missing",
    "is_unchanged",
    "list_inputs",
    "network_errors",
    "open_input",
    "open_store",
    "source_failure",
    "unpack_by_content",
    "without_compression",
]

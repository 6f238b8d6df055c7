"""Where bytes are read from and written to; the one package that knows file systems and object stores.

    open_store(OUT) -> LocalStore | ObjectStore        list_inputs(uri), open_input(uri) -> bytes of a source
                       local.py     objects.py                           inputs.py
                       a disk       \\___ s3.py, reader.py: requests, tried again while they may pass

Inputs are opened as a stream and decompressed on the way. Outputs go through `Store`, which writes whole objects only:
`put_once` and `create_exclusive` never overwrite, `replace` is for pointers and reports. Nothing is visible before it
is complete and kept. Credentials come from the environment alone, and no error, name or record holds them.
"""

from softshard.storage.inputs import InputFile, list_inputs, open_input
from softshard.storage.local import LocalStore
from softshard.storage.location import OUTPUT_FORMS, find_store_kind, find_uri_problem, open_store
from softshard.storage.objects import ObjectStore
from softshard.storage.s3 import Patience
from softshard.storage.store import Store

__all__ = [
    "OUTPUT_FORMS",
    "InputFile",
    "LocalStore",
    "ObjectStore",
    "Patience",
    "Store",
    "find_store_kind",
    "find_uri_problem",
    "list_inputs",
    "open_input",
    "open_store",
]

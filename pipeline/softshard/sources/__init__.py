"""Sources: a URI and a format to raw documents, one at a time.

files of a folder, glob or URI ──► decompressed stream ──► reader of the format ──► RawDocument
                                      a name on a hub ──► library ──────────────────┘

`formats.py` declares every format once; settings, schema and the job file reference take the names from there.
`listing.py` decides which files are read and names the others; `encoding.py` and `text.py` decode and split texts.
"""

"""Files that several commands write and read back.

In: text, rows and records of a command. Out: files that are complete at any moment, with checksums and types that are
checked when they are read. Also here: locks of folders, tables on the screen, versions of packages, and the command
line as records keep it. Read first: `files.py` (atomic writes), then `records.py` (a number with all it depends on).
"""

"""Files that several commands write and read back: atomic writes, checksums, locks of folders, typed reading."""

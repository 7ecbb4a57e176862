"""Byte-level BPE of whole batches of texts: a C kernel, called by `data.row_groups`."""

"""Pictures and an instruction in, vision-language tokens out; computed once, bound to what made them, read memory-mapped.

`cache` reads (torch, no transformers), `builder` writes, `extractor` computes the same tokens live, `tiny` makes a small checkpoint.
Nothing is imported here, so that settings and readers stay light.
"""

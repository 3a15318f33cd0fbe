"""Vision-language tokens of pictures and an instruction: computed once, bound to what made them, read memory-mapped.

`builder` writes a cache, `cache` reads it (torch, no transformers), `extractor` computes the same tokens live, `tiny`
makes a small checkpoint. Nothing is imported here, so that settings and readers stay light.
"""

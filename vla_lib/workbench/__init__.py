"""The workbench on top of the other rooms: what notebooks call, and the commands that run them."""

import sys

# jsonschema, below nbformat and papermill, would compile a grammar of IRIs as it is imported: four fifths of the time
# in which `vla run` starts (1.6 s of a core), for a format that no notebook has. Where the module is missing it does
# without.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

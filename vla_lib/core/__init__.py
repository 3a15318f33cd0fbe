"""What every room stands on: user errors, atomic files, front doors, progress lines. Imports nothing heavy."""

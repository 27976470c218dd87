"""Reading what others wrote: files, JSON, regular expressions and text for a terminal, in bounded
time and memory. It needs the standard library only, so every room may use it.

regular_files.py   bytes of a regular file up to a size; never a FIFO, a device or an endless file
json_text.py       JSON without repeated keys, huge numbers, deep nesting or broken text
patterns.py        regular expressions of a file, matched in polynomial time
printable.py       text without control characters
"""

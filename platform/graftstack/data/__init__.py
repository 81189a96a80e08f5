"""Images and labels from anywhere, as batches of pixels.

The way of a row, one module a step; importing this package loads neither torch nor pyarrow.

- `sources`: one function a source turns it into an Arrow table of encoded images and labels
- `table`: that table, checked, with integer labels and a fingerprint; no image is decoded
- `encoded`, `decode`: bytes of any image become ``uint8 [S, S, 3]``
- `cache`, `images`: decoded once and memory-mapped, or decoded anew for each batch
- `splits`, `batches`: which rows train and which validate; in what order, and on which rank
- `load`: all of it in one call
"""

"""Documents to packed data: split, parse in workers, align, pack, write, merge."""

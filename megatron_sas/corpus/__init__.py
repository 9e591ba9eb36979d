"""From text to packed data, offline: readers, parsers, alignment, packing, inspection."""

"""From finished runs to onsets, tables, a figure and a report."""

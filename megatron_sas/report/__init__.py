"""From runs and sweeps to onsets, tests, tables, figures, answers to the claims and report.html."""

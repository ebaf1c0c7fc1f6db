"""Metrics on runs: likelihood, generated text and its judge, and the page that shows them.

generate     text from a run                 judge     the character n-gram that judges it
evaluation   likelihood and judged samples   gather    metrics.json and report.html of a folder of runs
template     prompts and blanks
kept         which weights an evaluation.json is of
figures, report   the page
"""

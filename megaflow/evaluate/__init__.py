"""Metrics on runs: likelihood, generated text and its judge, and the page that shows them.

loaded       a run or a converted model, loaded     settings   how texts are written
generate     text from it                           flow_text, autoregressive_text, discrete_text   by its kind
template     prompts and blanks                     judge      the character n-gram that judges texts
evaluation   likelihood and judged samples          kept       which weights an evaluation.json is of
gather       metrics.json and report.html of a folder of runs; figures and report, the page
"""

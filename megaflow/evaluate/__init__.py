"""Metrics on runs: likelihood, generated text and its judge, and the page that shows them.

loaded       a run or a converted model, loaded     settings   how texts are written
generate     text from it                           flow_text, autoregressive_text, discrete_text   by its kind
template     prompts and blanks                     judge      the character n-gram that judges texts
evaluation   likelihood and judged samples          kept       which weights an evaluation.json is of
causal_judge generative perplexity under a causal language model, of a folder that hugging_face opens, or a run of ours
frontier     judged texts at equal entropy           mauve_score   MAUVE of them
verifiable   tasks whose answers code can check      answers       how many of them a run solves
gather       metrics.json and report.html of a folder of runs; figures and report, the page
"""

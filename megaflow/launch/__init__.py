"""Runs as Slurm jobs, and how runs are doing: slurm.py talks to Slurm, script.py renders a job from the template of slurm/, submit.py is
`megaflow submit`; host.py and after.py run within a job, on every host and after every attempt; records.py is what is known of jobs;
status.py and logs.py look at runs wherever they are.
"""

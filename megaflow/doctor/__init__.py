"""`megaflow doctor`: what a run needs and whether it is here. command.py is the command, findings.py what a check comes to; host.py looks
at a host, config.py at what a config needs of it, ranks.py at what lies between the processes of a job.
"""

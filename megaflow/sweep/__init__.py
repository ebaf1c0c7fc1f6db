"""Many runs of one config: design.py is what a sweep file stands for, points.py which of its runs are there, pool.py trains them on this
machine and array.py on a cluster; gather.py collects what they have come to, statistics.py are the numbers that are made of it, and page.py
shows them.
"""

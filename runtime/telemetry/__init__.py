"""What is counted and measured.

Lives here: counters, and later histograms and traces.
Does not live here: the `stats` method, which only collects.
"""

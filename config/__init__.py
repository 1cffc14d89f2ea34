"""Typed settings: every default with its unit and its reason.

Lives here: what can be set; how a file, the environment and flags override the defaults; when a file changed.
Does not live here: what a setting does. All parts hold the same `Settings` and read there what they need.
"""

"""`make gpu-check`: what the first hour on a GPU should show, in parts that can be repeated one by one.

A part is a module of this folder with a function `measure(setting)`, which yields names with their figures as it finds
them and raises where something is wrong. It runs in a process of its own, for a limited time.
"""

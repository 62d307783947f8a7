"""Photograph data sets: downloaded or taken from local archives, unpacked safely, converted to train ids, verified.

`download` and `archives` know files, `labels` and `layouts` know data sets, `manifest` and `verify` know prepared
folders; `prepare` puts them in order, and `command` is its command line. Nothing here needs torch, so that worker
processes start fast.
"""

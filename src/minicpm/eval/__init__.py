"""Evaluation: tasks as versioned data, a three-method contract for models, scorers, samples, reports.

    task.py       a task file: where its rows come from and the forms in which they are put
    forms.py      rows -> what is asked of a model, by templates
    contract.py   what a model must be able to do; engine_model.py, torch_model.py and url_model.py do it
    scorers.py    the answer in a text, and whether it is right; code.py runs what a model wrote, in a sandbox
    runner.py     tasks x models -> samples, resumable; statistics.py sums them up
    results.py    what a run leaves on disk; compare.py puts two of them side by side; report.py draws a page

What this leaves out: held-out loss while training (`train/heldout.py`), comparison of runtimes (`exchange/compare.py`).
"""

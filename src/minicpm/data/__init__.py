"""Documents → token shards → packed batches; mixtures; supervised and preference rows. NumPy only, never torch.

    sources, readers     text from files, folders, `stdlib:` and `hf:`; every bad row named by file, line and field
    cleaning             normalisation, filters, deduplication, decontamination, with a report of why rows went
    tokenization, shards text to memory-mapped ids
    packing, mixture     rows of one length; which row stands where in a run, as a pure function
    batches              arrays of those rows
    rows, row_formats    conversations and preferences, validated wholly before a model is loaded

What this leaves out: tensors, devices, steps and ranks, which belong to the trainer.
"""

from minicpm.data.batches import Batch, BatchStream, DocumentReference
from minicpm.data.mixture import Mix, Span, StageMixture, stage_mixture
from minicpm.data.shards import TokenShards

__all__ = ["Batch", "BatchStream", "DocumentReference", "Mix", "Span", "StageMixture", "TokenShards", "stage_mixture"]

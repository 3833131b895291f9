"""The optimizers a recipe can name for its weight matrices. Adding one: a file here, one line below, a test."""

from __future__ import annotations

from paramgolf.registry import Registry

MATRIX_OPTIMIZERS = Registry(
    "matrix optimizer",
    {
        "muon": "paramgolf.optim.muon:Muon",
        "muoneq_r": "paramgolf.optim.muoneq_r:MuonEqR",
        "muoneq_r_pr1394": "paramgolf.optim.muoneq_r:MuonEqRPR1394",
        "muoneq_r_pr1855": "paramgolf.optim.muoneq_r:MuonEqRPR1855",
        "normuon": "paramgolf.optim.normuon:NorMuon",
        "normuon_pr137": "paramgolf.optim.normuon_pr137:NorMuonPR137",
    },
)

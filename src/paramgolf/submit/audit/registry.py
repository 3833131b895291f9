"""The checks: name -> function(Submission) -> iterator of Finding, run in this order."""

from __future__ import annotations

from paramgolf.registry import Registry

CHECKS = Registry(
    "audit check",
    {
        "files": "paramgolf.submit.audit.check_files:check",
        "size": "paramgolf.submit.audit.check_size:check",
        "log": "paramgolf.submit.audit.check_log:check",
        "seeds": "paramgolf.submit.audit.check_seeds:check",
        "time": "paramgolf.submit.audit.check_time:check",
        "code": "paramgolf.submit.audit.check_code:check",
        "bytes": "paramgolf.submit.audit.check_bytes:check",
        "eval": "paramgolf.submit.audit.check_eval:check",
    },
)

"""What ``--elora`` refuses while serving: replacing the base weights, and giving the pool's memory away.

KV and adapters of one pool belong to one set of base weights, and adapters live in the memory that would be
released. SGLang has no flag for these, only endpoints. ``EloraTokenizerManager`` refuses them where they arrive:
HTTP 400 with the line below, no request disturbed.
"""

WEIGHTS = (
    "base weights cannot be replaced while serving with --elora; start the server again on the new model"
)
MEMORY = "memory cannot be released or resumed with --elora, adapters live in it; stop the server instead"

"""Which rows stay: ranks, rules, the ledger. In: a score column. Out: decisions. Knows no text, model or storage."""

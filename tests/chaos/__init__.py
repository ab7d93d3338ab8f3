"""Real workers and real servers that die at random moments, and what became of every job.

``make chaos`` runs all scenarios (`__main__`), ``make test`` a short mixed one per broker (`test_chaos`).
"""

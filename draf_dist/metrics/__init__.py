"""What is measured: pure functions of arrays.

Everywhere probability is float (n, K) with rows that sum to 1, label int (n,) in [0, K), confidence and error (n,). A number
that these data do not define (no study, one class only) is NaN; storing it as null with a reason is the caller's part.
"""

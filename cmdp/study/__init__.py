"""The study: every baseline, every ablation, a verdict for every claim (method, sections 7 to 9).

`arms` trains and reads, `tables` computes what the arms say together, `claims` judges, `figures` draws. All but the
training read results files alone.
"""

"""How good a model is: likelihoods, tasks over lm-evaluation-harness, generated code in a sandbox."""

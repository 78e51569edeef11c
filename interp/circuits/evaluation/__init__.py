"""Run a model as a circuit: faithfulness, completeness, minimality, curves."""

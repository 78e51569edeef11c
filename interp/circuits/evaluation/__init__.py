"""Running the model as a circuit: faithfulness, completeness, minimality, faithfulness curves."""

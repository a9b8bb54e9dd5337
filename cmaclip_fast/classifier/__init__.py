"""What users do with a trained model: `Classifier`, and what it is made of."""

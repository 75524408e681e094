"""From a recipe to a trained model, on Lightning Fabric."""

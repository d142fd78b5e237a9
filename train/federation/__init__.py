"""A federated training: clients that each train the common adapter on their own rows, and a server that averages."""

"""How the experts' rows become one: linear and logistic mixtures, Hedge, for a text and for one token."""

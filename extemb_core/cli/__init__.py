"""The commands of `extemb`, one file per family of verbs; heavy imports happen inside them."""

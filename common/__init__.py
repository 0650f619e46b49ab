"""Parts that every package of this repository shares; imports none of them."""

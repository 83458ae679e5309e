"""What --mesh says."""

import pytest

from grpo.run.devices import mesh_shape


def test_a_mesh_is_two_numbers():
    assert mesh_shape("2,4") == mesh_shape(" 2 , 4") == (2, 4)
    for text in ("2", "2,4,1", "2x4", "a,b", "-1,2", ""):
        with pytest.raises(ValueError, match="give two numbers, DATA,TENSOR, such as 2,4"):
            mesh_shape(text)

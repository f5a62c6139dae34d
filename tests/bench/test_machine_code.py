"""Reading of compiled kernels: access widths, bulk copies and static shared memory."""

import pytest

from bench.static import kernel_compiler, machine_code
from bench.static.machine_code import count_bulk_copies, count_ptx_accesses, count_sass_accesses
from mvsplit_ops._cuda import compile
from mvsplit_ops._cuda.launch import Program


def test_accesses_are_counted_by_width_in_ptx():
    ptx = """
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd1 + 0 ];
        ld.global.cg.b32 { %r5 }, [ %rd2 + 0 ];
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
        st.global.b16 [ %rd3 + 0 ], { %rs1 };
    """
    assert count_ptx_accesses(ptx, "ld") == {128: 2, 32: 1}
    assert count_ptx_accesses(ptx, "st") == {16: 1}


def test_accesses_are_counted_by_width_in_machine_code():
    code = """
        /*0100*/ LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0110*/ @!P0 LDG.E R8, desc[UR6][R2.64+0x40] ;
        /*0120*/ LDG.E.U16.CONSTANT R9, [R2.64] ;
        /*0130*/ LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64] ;
        /*0140*/ LDGSTSBAR.64.ARVCNT [UR4] ;
        /*0150*/ LDS.128 R12, [R5] ;
        /*0160*/ STG.E.64 desc[UR6][R2.64], R8 ;
    """
    assert count_sass_accesses(code, "ld") == {128: 2, 32: 1, 16: 1}
    assert count_sass_accesses(code, "st") == {64: 1}


def test_only_bulk_copies_to_shared_memory_are_counted():
    code = """
        /*0170*/ UBLKCP.S.G [UR8], [UR10], UR12 ;
        /*0180*/ UBLKCP.G.S [UR8], [UR10], UR12 ;
    """
    ptx = """
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 4, [%r2];
        cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 4;
    """
    assert count_bulk_copies(code) == count_bulk_copies(ptx) == 1


@pytest.mark.parametrize(("architecture", "name"), [(80, "sm_80"), (90, "sm_90a")])
def test_static_shared_memory_is_what_the_kernel_declares(
    architecture, name, tmp_path, monkeypatch
):
    body = "__shared__ float s[100]; s[threadIdx.x] = *x; __syncthreads(); *x = s[*x > 0];"
    source = f'extern "C" __global__ void some(float* x) {{ {body} }}\n'
    source += 'extern "C" __global__ void none(float* x) { *x = 1; }\n'
    (tmp_path / "shared.cu").write_text(source)
    monkeypatch.setattr(compile, "SOURCES", tmp_path)
    cubin = kernel_compiler.select_compiler().compile(Program("shared", ()), name)
    resources = machine_code.read_resources(cubin)
    assert machine_code.count_static_shared(resources["some"], architecture) == 400
    assert machine_code.count_static_shared(resources["none"], architecture) == 0

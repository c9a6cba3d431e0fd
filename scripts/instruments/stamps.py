import pathlib,re,sys
S=pathlib.Path('libetap/src/sm90')
def sub(f,a,b,n=1):
    t=(S/f).read_text(); assert t.count(a)>=1,(f,a); (S/f).write_text(t.replace(a,b,n))
sub('params.h','  float scale_log2;','  long long *trace;\n  float scale_log2;')
sub('decode_params.cc','namespace etap::sm90 {','#include <cstdlib>\nextern "C" __attribute__((visibility("default"))) long long *etap_trace_buffer;\nlong long *etap_trace_buffer = nullptr;\nextern "C" __attribute__((visibility("default"))) int etap_trace_calls;\nint etap_trace_calls = 0;\nnamespace etap::sm90 {')
t=(S/'decode_params.cc').read_text()
i=t.index('p.causal = ')
t=t[:i]+'p.trace = etap_trace_buffer == nullptr ? nullptr : etap_trace_buffer + (etap_trace_calls++ % 16) * 144 * 32;\n  '+t[i:]
t=t.replace('p.narrow = problem.out_dtype == ETAP_BF16;','p.narrow = problem.out_dtype == ETAP_BF16 && getenv("ETAP_WIDE") == nullptr;')
(S/'decode_params.cc').write_text(t)
sub('parts/piece.cuh','enum : int { kBarrierConsumers','''// [call][CTA][16 stages]: globaltimer, clock. By thread 128 the first time, or the last.
__device__ __forceinline__ void stamp(const DecodeParams &p, int stage, int by = 128) {
  if (p.trace != nullptr && static_cast<int>(threadIdx.x) == by) {
    long long *const at = p.trace + (blockIdx.x * 16 + stage) * 2;
    long long t, c;
    asm volatile("mov.u64 %0, %%globaltimer;\\n\\tmov.u64 %1, %%clock64;" : "=l"(t), "=l"(c)::"memory");
    at[0] = t;
    at[1] = c;
  }
}
enum : int { kBarrierConsumers''')
sub('parts/piece.cuh','''  const bool of_prefix = N == kPrefixRows && is_prefix(c.sequence), causal = p.causal && !of_prefix;
  if (threadIdx.x == 128) {''','''  stamp(p, 2);
  const bool of_prefix = N == kPrefixRows && is_prefix(c.sequence), causal = p.causal && !of_prefix;
  if (threadIdx.x == 128) {''')
sub('parts/piece.cuh','''  copy_async_wait_all();
  fence_proxy_async();
  named_barrier<kBarrierConsumers, kConsumers>();
}''','''  copy_async_wait_all();
  fence_proxy_async();
  named_barrier<kBarrierConsumers, kConsumers>();
  stamp(p, 3);
}''')
sub('parts/piece.cuh','''  const int lane = threadIdx.x % 32, ctas = x.end->ctas;
  if (ctas == 1) {
    named_barrier<kBarrierConsumers, kConsumers>();
''','''  stamp(p, 6);
  const int lane = threadIdx.x % 32, ctas = x.end->ctas;
  if (ctas == 1) {
    named_barrier<kBarrierConsumers, kConsumers>();
    stamp(p, 7);
''')
sub('parts/piece.cuh','''  if (kNarrows && p.narrow) narrow_exchange(x);
''','''  if (kNarrows && p.narrow) narrow_exchange(x);
  stamp(p, 10);
''')
sub('parts/piece.cuh','''  mbarrier_wait_cluster(x.parts_ready, nth & 1);
''','''  mbarrier_wait_cluster(x.parts_ready, nth & 1);
  stamp(p, 7);
''')
sub('parts/piece.cuh','''  if (!cut) return;

''','''  stamp(p, 8);
  if (!cut) return;

''')
sub('parts/piece.cuh','''__device__ __forceinline__ void fill_spare_rows(const DecodeParams &p, int d_latent) {''','''__device__ __forceinline__ void fill_spare_rows(const DecodeParams &p, int d_latent) {
  stamp(p, 9);''')
for f in ['token_split','e4m3_dv_split','rows_on_m','dv_split','e4m3_split']:
    f=f'kernels/{f}.cuh'
    sub(f,'  begin_kernel();','  stamp(p, 0);\n  begin_kernel();\n  stamp(p, 1);')
sub('kernels/rows_on_m.cuh','''        wgmma_fence_registers(math.S);
        math.softmax_and_values(block);''','''        wgmma_fence_registers(math.S);
        if (block == context.first_block()) stamp(p, 4);
        math.softmax_and_values(block);''')
sub('kernels/rows_on_m.cuh','''    wgmma_fence_registers(O);
    leave_rows<K>''','''    wgmma_fence_registers(O);
    stamp(p, 5);
    leave_rows<K>''')
sub('kernels/token_split.cuh','''        const int tokens = context.kv_end - block * kBlockTokens;
        wgmma_wait<0>();
''','''        const int tokens = context.kv_end - block * kBlockTokens;
        wgmma_wait<0>();
        if (i == wg) stamp(p, 4);
''')
sub('kernels/token_split.cuh','''      ColumnSoftmax<T, N>::reduce_groups(l);
''','''      stamp(p, 5);
      ColumnSoftmax<T, N>::reduce_groups(l);
''')
sub('kernels/e4m3_split.cuh','''      // ---- softmax ------------------------------------------------------------------------------------------------
''','''      if (blocks_done == 0) stamp(p, 4);
      // ---- softmax ------------------------------------------------------------------------------------------------
''')
t=(S/'kernels/e4m3_split.cuh').read_text()
t=re.sub(r'( *)(\S*reduce_groups\(l\);)',r'\1stamp(p, 5);\n\1\2',t,count=1)
(S/'kernels/e4m3_split.cuh').write_text(t)
# the merge kernel: stages 11 (waited) and 12 (done), by CTA
f='merge_pieces.cu'
sub(f,'  if (list.units == 0) return;','  stamp(p, 11, 0);\n  if (list.units == 0) return;')
sub(f,'''    merge_units<float4, D>(p, list, units, shared);
  }
''','''    merge_units<float4, D>(p, list, units, shared);
  }
  stamp(p, 12, 0);
''')

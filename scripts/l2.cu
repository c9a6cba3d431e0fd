#include <cstdio>
#include <cstdint>
#include <vector>
#include <algorithm>
#include <cuda_runtime.h>
#define CK(x) do{cudaError_t e=(x); if(e){printf("%s %d: %s\n",#x,__LINE__,cudaGetErrorString(e)); exit(1);}}while(0)
constexpr int BOX=8192, DEPTH=18;
__device__ __forceinline__ uint32_t sa(const void*p){return (uint32_t)__cvta_generic_to_shared(p);}
__device__ __forceinline__ void wait(uint32_t b,uint32_t par){asm volatile("{\n.reg .pred d;\nW:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 d,[%0],%1;\n@!d bra W;\n}\n"::"r"(b),"r"(par):"memory");}
// mode 0: each its own stream; 1: pairs read the same; 2: pairs multicast halves of each box; 3: even/odd boxes multicast
template<int MODE,int DP> __global__ void __launch_bounds__(128) k(const char*base,size_t region,int boxes,long long*out,size_t offset){
  extern __shared__ __align__(1024) char sm[];
  __shared__ uint64_t full[DEPTH], empty[DEPTH];
  uint32_t rank=0; if(MODE>=2) asm("mov.u32 %0,%%cluster_ctarank;":"=r"(rank));
  if(threadIdx.x==0){for(int i=0;i<DEPTH;i++){asm volatile("mbarrier.init.shared.b64 [%0],%1;"::"r"(sa(&full[i])),"r"(1));asm volatile("mbarrier.init.shared.b64 [%0],%1;"::"r"(sa(&empty[i])),"r"(MODE>=2?2:1));}
   asm volatile("fence.mbarrier_init.release.cluster;");}
  __syncthreads();
  if(MODE>=2) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;":::"memory");
  long long t0=clock64();
  int stream= MODE==0? blockIdx.x : blockIdx.x/2, streams= MODE==0? gridDim.x:gridDim.x/2;
  long long lat=0;
  if(threadIdx.x==0){
    int s=0,c9=0; uint32_t par=0; size_t at0=(offset+(size_t)stream*(9*BOX))%region; const size_t jump=(size_t)streams*9*BOX;
    for(int i=0;i<boxes;i++){
      wait(sa(&empty[s]),par^1);
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;"::"r"(sa(&full[s])),"r"(BOX):"memory");
      size_t at=at0+c9*BOX; if(++c9==9){c9=0; at0+=jump; if(at0>=region) at0-=region;}
      if(MODE<2) asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"::"r"(sa(sm+s*BOX)),"l"(base+at),"r"(BOX),"r"(sa(&full[s])):"memory");
      else if(MODE==2){ asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0],[%1],%2,[%3],%4;"::"r"(sa(sm+s*BOX)+rank*BOX/2),"l"(base+at+rank*BOX/2),"r"(BOX/2),"r"(sa(&full[s])),"h"((uint16_t)3):"memory"); }
      else if((i&1)==rank) asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0],[%1],%2,[%3],%4;"::"r"(sa(sm+s*BOX)),"l"(base+at),"r"(BOX),"r"(sa(&full[s])),"h"((uint16_t)3):"memory");
      if(++s==DP){s=0;par^=1;}
    }
  } else if(threadIdx.x==32){
    int s=0;uint32_t par=0; for(int i=0;i<boxes;i++){ wait(sa(&full[s]),par);
      if(MODE<2) asm volatile("mbarrier.arrive.shared.b64 _,[%0];"::"r"(sa(&empty[s])):"memory");
      else for(int c=0;c<2;c++){uint32_t r; asm volatile("mapa.shared::cluster.u32 %0,%1,%2;":"=r"(r):"r"(sa(&empty[s])),"r"(c)); asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _,[%0];"::"r"(r):"memory");}
      if(++s==DP){s=0;par^=1;}
    }
    out[blockIdx.x]=clock64()-t0;
  }
  __syncthreads();
  if(MODE>=2) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;":::"memory");
}
template<int MODE,int DP> void go(const char*base,size_t region,int boxes,int grid,const char*name){
  long long*out; CK(cudaMalloc(&out,8*256));
  CK(cudaFuncSetAttribute(k<MODE,DP>,cudaFuncAttributeMaxDynamicSharedMemorySize,DEPTH*BOX));
  cudaEvent_t a,b; cudaEventCreate(&a);cudaEventCreate(&b);
  std::vector<float> ts; std::vector<long long> h(grid);
  for(int r=0;r<6;r++){
    cudaLaunchConfig_t c{}; c.gridDim=grid;c.blockDim=128;c.dynamicSmemBytes=DEPTH*BOX; cudaLaunchAttribute at[1]; at[0].id=cudaLaunchAttributeClusterDimension; at[0].val.clusterDim={MODE>=2?2u:1u,1,1}; c.attrs=at;c.numAttrs=1;
    size_t off= region>(1ull<<30)? (size_t)r*(300ull<<20)/ (9*BOX)*(9*BOX):0;
    cudaEventRecord(a); CK(cudaLaunchKernelEx(&c,k<MODE,DP>,base,region,boxes,out,off)); cudaEventRecord(b); CK(cudaEventSynchronize(b)); float ms; cudaEventElapsedTime(&ms,a,b); ts.push_back(ms);}
  CK(cudaMemcpy(h.data(),out,8*grid,cudaMemcpyDeviceToHost)); std::sort(h.begin(),h.end()); std::sort(ts.begin(),ts.end());
  printf("%-34s grid %3d depth %2d: %.2f TB/s into SMs, %.0f cycles per 73728 B (median CTA), %.1f us\n",name,grid,DP,(double)grid*boxes*BOX/ts[2]/1e9,(double)h[grid/2]/(boxes/9.),ts[2]*1e3);
}
int main(){
  size_t big=3ull<<30; char*p; CK(cudaMalloc(&p,big)); CK(cudaMemset(p,1,big));
  size_t l2=(size_t)24<<20; l2=l2/(9*BOX)*(9*BOX); big=big/(9*BOX)*(9*BOX);
  for(int grid:{132,66}){
    go<0,9>(p,l2,9*124,grid,"own streams, 24 MB in L2"); go<0,18>(p,l2,9*124,grid,"own streams, 24 MB in L2");
    go<1,9>(p,l2,9*124,grid,"pairs the same, 24 MB in L2"); go<1,18>(p,l2,9*124,grid,"pairs the same, 24 MB in L2");
    go<0,18>(p,big,9*124,grid,"own streams, HBM"); go<1,18>(p,big,9*124,grid,"pairs the same, HBM");
    go<1,9>(p,big,9*124,grid,"pairs the same, HBM");
    go<2,18>(p,big,9*124,grid,"multicast of halves, HBM"); go<3,18>(p,big,9*124,grid,"multicast of boxes, HBM"); go<3,18>(p,l2,9*124,grid,"multicast of boxes, L2"); }
}

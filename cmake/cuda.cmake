# The CUDA device: the operators compiled against csrc/cuda/device.h, and the stages' kernels. Included by the root, and
# leaves there moe_ops_cuda (where it is built), cuda_architectures and cuda_version.

set(cuda_architectures "none")
set(cuda_version "none")
if(MOE_OPS_CUDA STREQUAL "AUTO" AND "$ENV{FORCE_CUDA}" STREQUAL "1")
  set(MOE_OPS_CUDA ON CACHE STRING "" FORCE)  # so that it holds when the build configures itself again
endif()
if(NOT MOE_OPS_CUDA OR (MOE_OPS_CUDA STREQUAL "AUTO" AND MOE_OPS_SANITIZE))
  return()
elseif(MOE_OPS_SANITIZE)
  message(FATAL_ERROR "moe_ops: sanitizers are for code of the CPU: build with -DMOE_OPS_CUDA=OFF and without FORCE_CUDA")
endif()

# nvcc: the one that is named (CMAKE_CUDA_COMPILER, CUDACXX, CUDA_HOME), the one that PyPI's packages put beside torch, or
# the machine's. The environment that an isolated build was started from is looked into as well.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
  OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
  file(GLOB pypi_cuda ${torch_dir}/../nvidia/cu*/bin ${site_packages}/nvidia/cu*/bin)
  find_program(CMAKE_CUDA_COMPILER nvcc PATHS $ENV{CUDA_HOME}/bin ${pypi_cuda} NO_DEFAULT_PATH)
  find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin)
elseif(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
endif()

set(no_nvcc "no nvcc was found: install CUDA's, or PyPI's (pip install 'cuda-toolkit[nvcc,cccl]==13.0.*')")
if(MOE_OPS_CUDA STREQUAL "AUTO")
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.cuda.is_available())"
    OUTPUT_VARIABLE torch_sees_gpu OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(NOT torch_sees_gpu STREQUAL "True")
    message(STATUS "moe_ops: no CUDA kernels, as torch sees no GPU (FORCE_CUDA=1 builds them all the same)")
    return()
  elseif(NOT CMAKE_CUDA_COMPILER)
    message(WARNING "moe_ops: no CUDA kernels, though torch sees a GPU: ${no_nvcc}")
    return()
  endif()
elseif(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "moe_ops: CUDA kernels were asked for (MOE_OPS_CUDA or FORCE_CUDA), but ${no_nvcc}")
endif()

# Machine code for Ampere and Hopper, and PTX that the driver compiles for what came between and after.
if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  string(REGEX REPLACE "[ ,;]+" ";" wanted "$ENV{TORCH_CUDA_ARCH_LIST}")  # as in "8.0;9.0a+PTX"
  foreach(entry IN LISTS wanted)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
      message(FATAL_ERROR "moe_ops: TORCH_CUDA_ARCH_LIST must be like '8.0;9.0a+PTX', got '$ENV{TORCH_CUDA_ARCH_LIST}'")
    endif()
    set(kind "-real")
    if(CMAKE_MATCH_3)
      set(kind "")
    endif()
    list(APPEND architectures ${CMAKE_MATCH_1}${CMAKE_MATCH_2}${kind})
  endforeach()
else()
  set(architectures 80 90a-real)
endif()
set(CMAKE_CUDA_ARCHITECTURES ${architectures} CACHE STRING "As in '80;90a-real': machine code and PTX, or one of them")

set(cuda_architectures "")
foreach(entry IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(NOT entry MATCHES "^([0-9]+)([af]?)(-real|-virtual|)$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "moe_ops: the CUDA kernels need architectures from 80 on, as in '80;90a-real', got '${entry}'")
  endif()
  if(NOT CMAKE_MATCH_3 STREQUAL "-virtual")
    string(APPEND cuda_architectures " sm_${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  endif()
  if(NOT CMAKE_MATCH_3 STREQUAL "-real")
    string(APPEND cuda_architectures " compute_${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  endif()
endforeach()
string(STRIP "${cuda_architectures}" cuda_architectures)

set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # linked by its path below: PyPI's packages have no libcudart.so without a number
cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH nvcc_dir)
set(ENV{LIBRARY_PATH} "${nvcc_dir}/../lib:$ENV{LIBRARY_PATH}")  # PyPI's nvcc expects lib64, and is first tried by linking
enable_language(CUDA)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
string(REGEX MATCH "^[0-9]+" cuda_major ${CMAKE_CUDA_COMPILER_VERSION})
string(REGEX MATCH "^[0-9]+\\.[0-9]+" cuda_version ${CMAKE_CUDA_COMPILER_VERSION})
find_library(cudart libcudart.so.${cuda_major} PATHS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${nvcc_dir}/../lib REQUIRED)

# torch's CUDA library, as far as it is used, so that any torch will do to build with, one for CPUs included.
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp "extern \"C\" __attribute__((visibility(\"default\"))) void aoti_torch_get_current_cuda_stream() {}\n")
add_library(torch_cuda SHARED ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp)

file(GLOB launch_sources CONFIGURE_DEPENDS csrc/cuda/launch/*.cu)
file(GLOB hopper_sources CONFIGURE_DEPENDS csrc/cuda/launch/sm90/*.cu)
add_library(moe_ops_cuda SHARED ${op_sources} csrc/cuda/device.cpp ${launch_sources})
# What only sm_90a has instructions for; it lies unused on other cards. Its PTX comes with it, for whoever executes PTX.
add_library(moe_ops_hopper OBJECT ${hopper_sources})
set_target_properties(moe_ops_hopper PROPERTIES POSITION_INDEPENDENT_CODE ON CUDA_ARCHITECTURES 90a)
target_include_directories(moe_ops_hopper PRIVATE csrc csrc/cuda)
target_sources(moe_ops_cuda PRIVATE $<TARGET_OBJECTS:moe_ops_hopper>)
target_include_directories(moe_ops_cuda PRIVATE csrc csrc/cuda)
target_include_directories(moe_ops_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_definitions(moe_ops_cuda PRIVATE MOE_BUILT_FOR_CUDA="${cuda_architectures}")
set_source_files_properties(csrc/cuda/device.cpp PROPERTIES COMPILE_DEFINITIONS USE_CUDA)  # torch's headers ask for it
target_link_libraries(moe_ops_cuda PRIVATE torch_stable torch_cuda ${cudart})
target_link_options(moe_ops_cuda PRIVATE -Wl,-z,defs)  # a stage without a launch shows here, not at load
set_target_properties(moe_ops_cuda PROPERTIES LINKER_LANGUAGE CXX
  BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN;$ORIGIN/../torch/lib;$ORIGIN/../nvidia/cu${cuda_major}/lib")
install(TARGETS moe_ops_cuda LIBRARY DESTINATION moe_ops)
message(STATUS "moe_ops: CUDA kernels for ${cuda_architectures}, by nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
